"""What several tests need; tests import it from here and never from each other."""
