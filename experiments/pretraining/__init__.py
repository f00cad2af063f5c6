"""A small decoder trained from nothing on real text: base L of the claims."""
