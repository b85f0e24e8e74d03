"""A run as a file that other programs can use: what is written was compared with the network on real rows."""
