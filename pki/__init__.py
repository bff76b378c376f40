"""The authority that signs leaves, its life on disk and through rotations, and the trust bundle that workloads read.

values      profile, constraints, authority: what certificates hold, and issuing them; chains: which CA signed which
steps       rotation: each takes an authority and gives the next; plan: what is due, and when; lint: what is wrong
store       store, by store_reading and store_writing; state: what state.json says; layout: names; files: whole or not
keys        signer, key_uri: in a token; pkcs12: as others hand them out; issuers: in memory, between processes
leaves      leaves: a TLS context for each host
trust       distribution: the bundle as bytes, and the variables; bundle_source: what goes into it; trust: the directory
            install: a machine's own store; doctor, by clients and scripts: which programs trust us; jks, der: formats
kubernetes  the bundle in every namespace
"""
