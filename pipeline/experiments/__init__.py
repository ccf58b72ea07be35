"""Class-incremental experiments on a store: runs, sweeps, metrics and routing queries."""
