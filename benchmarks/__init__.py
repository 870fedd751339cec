"""Every number in the docs is printed by a script here."""
