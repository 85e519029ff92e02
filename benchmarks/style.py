"""How models look in figures: the same colour and marker in all experiments."""

from collections.abc import Mapping

STYLES: Mapping[str, tuple[str, str]] = {
    "attention": ("#000000", "D"),
    "gdn": ("#0072B2", "s"),
    "gdn_negative": ("#56B4E9", "s"),
    "gdn_hybrid": ("#0072B2", "H"),
    "kda": ("#56B4E9", "^"),
    "comba": ("#009E73", "v"),
    "gdn2": ("#0072B2", "p"),
    "mamba2": ("#CC79A7", "P"),
    "mamba3": ("#CC79A7", "*"),
    "titans": ("#999999", "h"),
    "mdn": ("#D55E00", "o"),
    "mdn_hybrid": ("#D55E00", "H"),
    "mdn_slow": ("#E69F00", "o"),
    "mdn_stable": ("#009E73", "D"),
    "mdn_unbounded": ("#000000", "X"),
    "mdn_uncorrected": ("#D55E00", "X"),
    "mdn_slow_uncorrected": ("#E69F00", "X"),
    "no-momentum": ("#E69F00", "<"),
    "no-output-correction": ("#E69F00", "X"),
    "no-beta-bound": ("#999999", ">"),
    "no-alpha-bound": ("#999999", "d"),
    "no-mu-clamp": ("#999999", "*"),
}
"""Of a model: one of Okabe and Ito's colours, which the colour-blind tell apart, and a marker."""
