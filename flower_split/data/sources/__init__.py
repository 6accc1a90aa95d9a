"""The data sources that are built in, one in each module."""
