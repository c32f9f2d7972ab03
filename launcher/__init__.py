"""Commands, settings, launch environments, and supervision of ranks. Imports model and parallel."""
