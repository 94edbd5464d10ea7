"""Manifests for Kubernetes, as kustomize takes them."""
