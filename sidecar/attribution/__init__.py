"""From what the kernel noted at connect to a process tree, a cgroup, a CI job."""
