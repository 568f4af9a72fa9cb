"""A worker: claims the runs that fastapi_app.py enqueues and executes them. Start as many as you like.

From the repository:  python examples/worker.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `tidebase` lies one folder up

from tidebase import Tidebase
from workflows import generate_report

tide = Tidebase()
tide.workflow("generate-report", generate_report)
tide.work(queues=["default"])  # blocks; retries/backoff/leases are Tidebase's problem
