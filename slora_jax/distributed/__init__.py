"""Several processes that serve one model together: process 0 leads, the others make its calls on their own devices."""
