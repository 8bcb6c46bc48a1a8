"""Many runs: configs × values × seeds trained one after another with shared caches, resumable."""
