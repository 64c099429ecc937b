"""Natswarm: a serverless mesh through carrier-grade NATs."""
