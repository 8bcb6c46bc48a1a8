"""Image i of a prompt set from seed s is one definite image, on any number of processes."""
