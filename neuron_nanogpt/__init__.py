"""GPT-2 on AWS Trainium."""

import os

# waiting threads soon sleep: next to other work, threads that spin hold up the ones they wait for
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # before torch is imported
