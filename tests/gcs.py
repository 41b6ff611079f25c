"""`python -m tests.gcs PORT` is Google Cloud Storage, with one bucket: `runs`, in memory.

The emulator by itself says nothing of generations and asks for none, and TensorStore, which writes
the arrays of a checkpoint, has an object replaced only if it is still the one that it read.
"""

import http.server
import sys
from http import HTTPStatus

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects


def generation(storage, bucket, name):
  """Of an object that is there; '0' for one that is not."""
  try:
    return storage.get_file_obj(bucket, name)['generation']
  except NotFound:
    return '0'


def only_if(handler, otherwise):
  """The handler, which first asks whether the object is the one that the client thinks it is."""

  def handle(request, response, storage, *args, **kwargs):
    query, bucket = request.query, request.params['bucket_name']
    (name,) = query.get('name', [request.params.get('object_id')])
    now = generation(storage, bucket, name)
    response['x-goog-generation'] = now
    same, other = (query.get(f'ifGeneration{word}Match') for word in ('', 'Not'))
    if same and same[0] != now:
      response.status = HTTPStatus.PRECONDITION_FAILED
    elif other and other[0] == now:
      response.status = otherwise
    else:
      handler(request, response, storage, *args, **kwargs)

  return handle


for method in ('insert', 'delete'):
  setattr(objects, method, only_if(getattr(objects, method), HTTPStatus.PRECONDITION_FAILED))
for method in ('download', 'get'):
  setattr(objects, method, only_if(getattr(objects, method), HTTPStatus.NOT_MODIFIED))

from gcp_storage_emulator import server  # noqa: E402  # it takes the handlers as they are now

if __name__ == '__main__':
  # Clients that go away early are many, and are no news.
  http.server.HTTPServer.handle_error = lambda *_: None
  server.RequestHandler.log_message = lambda *_: None
  server.create_server('127.0.0.1', int(sys.argv[1]), True, default_bucket='runs').run()
