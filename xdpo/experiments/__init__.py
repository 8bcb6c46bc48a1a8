"""Many runs: configs × values × seeds as cells, trained one after another with shared caches, resumable."""
