"""`mneme launch`: what a cluster has to do (`spec`), and a file for each kind of cluster that says it."""
