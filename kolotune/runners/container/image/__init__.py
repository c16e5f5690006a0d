"""What the container's image is built from: a Dockerfile and the pinned packages."""
