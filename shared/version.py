"""The version of the services."""

VERSION = "0.1.0"
