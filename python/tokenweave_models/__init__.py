"""Reference models and runners assembled from the public functions of tokenweave_ops, one sub-package per system."""
