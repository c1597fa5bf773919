"""Reads course texts and documents, condenses long ones, and reviews drafts: in processes of its own (`__main__`)."""
