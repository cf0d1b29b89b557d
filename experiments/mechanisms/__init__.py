"""The mechanisms of the system, each on and off, side by side: on the real engine on a CPU, and in the simulator."""
