"""What the server in tidebase.py stands on, and who wants to know how Tidebase works need not read."""
