"""Any known checkpoint into our encoder (`weights`), and our encoder into other libraries (`export`)."""
