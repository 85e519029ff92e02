from tests.compile_cache import compile_once as compile_once
