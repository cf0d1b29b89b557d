"""The server under load: one list of requests, answered by the engine alone and by `slora serve` to a load tester."""
