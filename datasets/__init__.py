"""Where digits come from that are not MNIST's or USPS's."""
