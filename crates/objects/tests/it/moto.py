"""moto's server, with one request at a time in it: it looks and then writes, and would give one name to two writers."""

import threading, moto.server
run, lock = moto.server.run_simple, threading.Lock()
def run_one_at_a_time(host, port, app, **options):
    def one(environ, start_response):
        with lock:
            return app(environ, start_response)
    run(host, port, one, **options)
moto.server.run_simple = run_one_at_a_time
moto.server.main()
