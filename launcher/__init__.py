"""The front: commands, settings, launch environments, starting and watching ranks. Imports model and parallel."""
