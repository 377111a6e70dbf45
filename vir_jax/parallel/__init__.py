"""Many devices and processes: mesh, sharding, and what a compiled program needs of them."""
