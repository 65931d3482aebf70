"""Tools for those who write kernels."""
