"""The demonstration: a real model and real data that every machine can get, and what is done with them."""
