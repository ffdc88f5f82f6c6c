"""Stored results of references that the tests do not install, and the programs that wrote them."""
