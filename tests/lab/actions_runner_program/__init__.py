"""A stand-in for GitHub's runner program: bin/Runner.Listener and bin/Runner.Worker.

Files, arguments, variables, lines of output and exit codes are those of the real program (its
source is public: github.com/actions/runner); what goes over the wire is made up. Needs nothing but
the standard library, since it is copied into a package and started from there.
"""
