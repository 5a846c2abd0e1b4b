"""The public ops: one file each, with its checks, its registration and its choice of backend."""
