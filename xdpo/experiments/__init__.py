"""Many runs: resumable sweeps over configs × values × seeds with shared caches, and reproductions of the paper."""
