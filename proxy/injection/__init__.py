"""A gate beside the workload in its pod: what becomes of a pod's specification, as a function of it. No file, no clock.

model     what the operator says, and what comes of it; reading: a specification that is nobody's to trust
refusals  what no guard can hold; workload: a container that it can; trusting: whom it trusts
gate      the containers and volumes that are put beside it; pod: all of it together
patch     the difference, as RFC 6902; objects: where pods are in other kinds; review: what an API server asks
admission_policy  the same without a server, in CEL
"""
