"""What somebody who reads tidebase.py need not read: each module here is one matter of the server, and uses nothing of
tidebase.py."""
