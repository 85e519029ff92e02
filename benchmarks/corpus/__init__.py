"""A corpus of text and source code from the packages of a Debian system."""
