"""Multi-query associative recall with the settings of Zoology (arXiv 2312.04927)."""
