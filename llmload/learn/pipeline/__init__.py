"""A model in training whose blocks lie on several devices: stages, and the device that leads."""
