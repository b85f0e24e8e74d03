"""Small data that come with whipray, so that every task can be tried at once; THIRD_PARTY.md says whose they are."""
