"""Stands in for sqlalchemy, which mlflow needs for a database."""
