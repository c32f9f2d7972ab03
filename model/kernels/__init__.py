"""Native kernels: C sources and the library that calls them."""
