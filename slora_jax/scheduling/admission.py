"""When a request may start."""

ADMISSIONS = ("optimistic", "reserve")
"""What fits now, or what fits with all output that it may still have (`SchedulerLimits.admission`)."""
