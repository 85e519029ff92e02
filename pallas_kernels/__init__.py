"""GPU kernels in Pallas, compiled to Triton. Imports jax only and knows nothing of layers."""
