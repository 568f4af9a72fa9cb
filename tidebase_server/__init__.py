"""What the server, tidebase.py, is built on: parts that one need not read to know how Tidebase works."""
