"""Do the versions that are claimed work?"""
