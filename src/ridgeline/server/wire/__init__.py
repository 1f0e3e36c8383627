"""What goes over the wire: bodies that are taken, answers and chunks that are given."""
