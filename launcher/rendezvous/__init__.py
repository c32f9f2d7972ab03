"""How ranks and nodes find each other."""
