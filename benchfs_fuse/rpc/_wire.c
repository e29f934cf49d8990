/* Carry the messages of one connection over UCX, and poll for them: what PlainWire of wire.py does, which says what
 * each function means, without Python between a message and the next look for one.
 *
 * UCX's own library is the one that ucxx has loaded; worker and endpoint are ucxx's, by their handles. Everything here
 * runs in the thread of the event loop, with Python's lock: UCX calls nobody back from another thread.
 *
 * An operation is under way until UCX has called back, or has said at once how it ended. Its memory stays UCX's until
 * then, or until the worker is destroyed: whoever drops a receive cancels it, and `release` frees what is left.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include <dlfcn.h>
#include <endian.h>
#include <sched.h>
#include <time.h>

#include <ucp/api/ucp.h>

/* SHA-256 of this file, as setup.py has seen it: see compiled.py. */
__attribute__((visibility("default"))) const char benchfs_source[] = BENCHFS_SOURCE;

static struct {
    ucs_status_ptr_t (*send)(ucp_ep_h, const void *, size_t, ucp_tag_t, const ucp_request_param_t *);
    ucs_status_ptr_t (*receive)(ucp_worker_h, void *, size_t, ucp_tag_t, ucp_tag_t, const ucp_request_param_t *);
    ucp_tag_message_h (*probe)(ucp_worker_h, ucp_tag_t, ucp_tag_t, int, ucp_tag_recv_info_t *);
    unsigned (*progress)(ucp_worker_h);
    ucs_status_t (*arm)(ucp_worker_h);
    void (*cancel)(ucp_worker_h, void *);
    void (*free)(void *);
    const char *(*text)(ucs_status_t);
} ucx;

/* One operation of UCX. `status` is UCS_INPROGRESS while it is under way. */
typedef struct {
    void *request;
    ucs_status_t status;
    size_t length;
} step_t;

/* One send, or one receive of a payload, with the buffer that it holds. `owner`: a Receive points to it. */
typedef struct op {
    struct op *next, *previous;
    step_t step;
    Py_buffer buffer;
    PyObject *release;
    int is_send;
    int owner;
} op_t;

/* One buffer for a control message. */
typedef struct {
    step_t step;
    char *data;
} piece_t;

typedef struct {
    PyObject_HEAD
    ucp_worker_h worker;
    ucp_ep_h endpoint;
    PyObject *frame_type, *decode, *error, *empty;
    PyObject *memory; /* a memoryview of the buffers for control messages */
    Py_buffer pinned; /* the same, held */
    unsigned long long control_tag;
    Py_ssize_t piece_size, body_max, inline_max, payload_max;
    piece_t *pieces; /* a ring: posted ones from `head` on, before it those that were taken and are not yet posted anew */
    int count, head, taken, attached;
    op_t all; /* the ring of all operations */
    int unsent, dropped;
    char failed;
} wire_t;

typedef struct {
    PyObject_HEAD
    wire_t *wire;
    op_t *op;
} receive_t;

static PyTypeObject receive_type;

/* ── operations ─────────────────────────────────────────────────────────────────────────────────────────────────── */

static void on_sent(void *request, ucs_status_t status, void *user_data)
{
    step_t *step = user_data;

    step->status = status;
    step->request = NULL;
    ucx.free(request);
}

static void on_received(void *request, ucs_status_t status, const ucp_tag_recv_info_t *info, void *user_data)
{
    step_t *step = user_data;

    step->status = status;
    step->length = status == UCS_OK ? info->length : 0;
    step->request = NULL;
    ucx.free(request);
}

/* Note what UCX said of an operation that it was given. */
static void begun(step_t *step, ucs_status_ptr_t found, size_t length)
{
    if (found == NULL) {
        step->status = UCS_OK;
        step->length = length;
    } else if (UCS_PTR_IS_ERR(found)) {
        step->status = UCS_PTR_STATUS(found);
    } else if (step->status == UCS_INPROGRESS) { /* or it was called back by now, and the request is gone */
        step->request = found;
    }
}

static void begin_receive(wire_t *self, step_t *step, void *data, size_t length, ucp_tag_t tag)
{
    ucp_tag_recv_info_t info = {0};
    ucp_request_param_t param = {
        .op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_MEMORY_TYPE |
                        UCP_OP_ATTR_FIELD_RECV_INFO,
        .cb.recv = on_received,
        .user_data = step,
        .memory_type = UCS_MEMORY_TYPE_HOST,
        .recv_info.tag_info = &info,
    };

    step->request = NULL;
    step->status = UCS_INPROGRESS;
    ucs_status_ptr_t found = ucx.receive(self->worker, data, length, tag, ~(ucp_tag_t)0, &param);
    begun(step, found, info.length);
}

static PyObject *raise_status(wire_t *self, ucs_status_t status)
{
    PyErr_SetString(self->error, ucx.text(status));
    return NULL;
}

static void link_op(op_t *ring, op_t *op)
{
    op->next = ring;
    op->previous = ring->previous;
    op->previous->next = ring->previous = op;
}

static op_t *add_op(wire_t *self, PyObject *buffer, int flags)
{
    op_t *op = PyMem_Calloc(1, sizeof *op);

    if (op == NULL)
        return (op_t *)PyErr_NoMemory();
    if (PyObject_GetBuffer(buffer, &op->buffer, flags) != 0) {
        PyMem_Free(op);
        return NULL;
    }
    op->step.status = UCS_INPROGRESS;
    link_op(&self->all, op);
    return op;
}

static void unlink_op(op_t *op)
{
    op->previous->next = op->next;
    op->next->previous = op->previous;
    op->next = op->previous = op;
}

static void free_op(op_t *op)
{
    unlink_op(op);
    PyBuffer_Release(&op->buffer);
    Py_XDECREF(op->release);
    PyMem_Free(op);
}

/* Free what is out and what was cancelled; then call the releases, which may send again. Returns -1 for an exception.
 *
 * What is done leaves the ring before Python is called, which may collect garbage, and a Receive with it. */
static int reap(wire_t *self)
{
    op_t done = {.next = &done, .previous = &done};
    PyObject *releases = NULL;
    int result = 0;

    for (op_t *op = self->all.next, *next; op != &self->all; op = next) {
        next = op->next;
        if (op->step.status == UCS_INPROGRESS || op->owner)
            continue;
        if (op->is_send) {
            self->unsent--;
            self->failed |= op->step.status != UCS_OK;
        } else {
            self->dropped--;
        }
        unlink_op(op);
        link_op(&done, op);
    }
    while (done.next != &done) {
        op_t *op = done.next;
        if (op->release != NULL) {
            if (releases == NULL && (releases = PyList_New(0)) == NULL)
                result = -1;
            if (releases != NULL && PyList_Append(releases, op->release) != 0)
                result = -1;
        }
        free_op(op);
    }
    for (Py_ssize_t i = 0; releases != NULL && i < PyList_GET_SIZE(releases); i++) {
        PyObject *called = PyObject_CallNoArgs(PyList_GET_ITEM(releases, i));
        if (called == NULL)
            result = -1;
        Py_XDECREF(called);
    }
    Py_XDECREF(releases);
    return result;
}

/* ── control messages ───────────────────────────────────────────────────────────────────────────────────────────── */

/* Post the receives anew of control messages that were dealt with. */
static void post_taken(wire_t *self)
{
    while (self->taken > 0) {
        piece_t *piece = &self->pieces[(self->head - self->taken + self->count) % self->count];
        self->taken--;
        begin_receive(self, &piece->step, piece->data, self->piece_size, self->control_tag);
    }
}

static unsigned get16(const char *at)
{
    uint16_t value;

    memcpy(&value, at, sizeof value);
    return le16toh(value);
}

static unsigned long get32(const char *at)
{
    uint32_t value;

    memcpy(&value, at, sizeof value);
    return le32toh(value);
}

/* Return a part of the memory for control messages, as a memoryview. */
static PyObject *view_of(wire_t *self, const char *data, Py_ssize_t length)
{
    Py_ssize_t start = data - (const char *)self->pinned.buf;
    PyObject *from = PyLong_FromSsize_t(start), *to = PyLong_FromSsize_t(start + length), *slice = NULL, *view = NULL;

    if (from != NULL && to != NULL && (slice = PySlice_New(from, to, NULL)) != NULL)
        view = PyObject_GetItem(self->memory, slice);
    Py_XDECREF(from);
    Py_XDECREF(to);
    Py_XDECREF(slice);
    return view;
}

/* Decode a control message as `decode` of frames.py does, which is asked wherever something is not as it must be. */
static PyObject *frame_of(wire_t *self, const piece_t *piece)
{
    enum { HEADER = 28, MAGIC = 0xBF5E, VERSION = 1, REQUEST = 1, REPLY = 2, FIELDS = 8 };
    const char *data = piece->data;
    Py_ssize_t length = piece->step.length;

    if (length >= HEADER && get16(data) == MAGIC && data[2] == VERSION) {
        int kind = data[3];
        Py_ssize_t slot = get16(data + 10), body = get32(data + 12), in_line = get32(data + 16);
        Py_ssize_t bulk = get32(data + 20), want = get32(data + 24);
        int sound = body <= self->body_max && in_line <= self->inline_max && length >= HEADER + body + in_line;
        if (kind == REQUEST)
            sound = sound && !(in_line && bulk) && !((in_line || bulk) && want) && want <= self->payload_max &&
                    (!bulk || (bulk > self->inline_max && bulk <= self->payload_max));
        else
            sound = sound && kind == REPLY && !want && !slot && !(in_line && bulk) && bulk <= self->payload_max;
        if (sound) {
            PyObject *fields[FIELDS] = {
                PyLong_FromLong(kind),
                PyLong_FromUnsignedLong(get32(data + 4)),
                PyLong_FromLong(get16(data + 8)),
                PyBytes_FromStringAndSize(data + HEADER, body),
                in_line ? view_of(self, data + HEADER + body, in_line) : Py_NewRef(self->empty),
                PyLong_FromSsize_t(bulk),
                PyLong_FromSsize_t(want),
                PyLong_FromSsize_t(slot),
            };
            PyTypeObject *type = (PyTypeObject *)self->frame_type;
            PyObject *frame = type->tp_alloc(type, FIELDS);
            int complete = frame != NULL;
            for (int i = 0; i < FIELDS; i++) {
                complete = complete && fields[i] != NULL;
                if (frame != NULL)
                    PyTuple_SET_ITEM(frame, i, fields[i]);
                else
                    Py_XDECREF(fields[i]);
            }
            if (!complete)
                Py_CLEAR(frame);
            return frame;
        }
    }
    PyObject *view = view_of(self, data, length);
    PyObject *frame = view != NULL ? PyObject_CallOneArg(self->decode, view) : NULL;
    Py_XDECREF(view);
    return frame;
}

static int head_is_there(const wire_t *self)
{
    return self->taken < self->count && self->pieces[self->head].step.status != UCS_INPROGRESS;
}

/* Return the control messages that are there, in order; at most half of the receives are missing then. */
static PyObject *take(wire_t *self)
{
    PyObject *frames = PyList_New(0);

    while (frames != NULL && self->taken < self->count / 2 && head_is_there(self)) {
        piece_t *piece = &self->pieces[self->head];
        if (piece->step.status != UCS_OK) {
            self->failed = 1;
            break;
        }
        PyObject *frame = frame_of(self, piece);
        if (frame == NULL) {
            if (PyList_GET_SIZE(frames) == 0) {
                Py_CLEAR(frames);
            } else {
                PyErr_Clear(); /* first those before it: the next poll says what is wrong */
            }
            break;
        }
        self->head = (self->head + 1) % self->count;
        self->taken++;
        if (PyList_Append(frames, frame) != 0)
            Py_CLEAR(frames);
        Py_DECREF(frame);
    }
    return frames;
}

static long long now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

/* ── what Python sees ───────────────────────────────────────────────────────────────────────────────────────────── */

static PyObject *wire_poll(wire_t *self, PyObject *argument)
{
    long long patience = PyLong_AsLongLong(argument), began = 0;

    if (patience == -1 && PyErr_Occurred())
        return NULL;
    if (self->taken >= self->count / 2)
        post_taken(self);
    while (!ucx.progress(self->worker) && !head_is_there(self)) {
        if ((self->unsent || self->dropped) && reap(self) != 0)
            return NULL;
        post_taken(self);
        if (head_is_there(self))
            break;
        if (patience <= 0)
            Py_RETURN_NONE;
        if (began == 0)
            began = now_ns();
        else if (now_ns() - began >= patience)
            Py_RETURN_NONE;
        sched_yield();
    }
    while (ucx.progress(self->worker))
        ;
    PyObject *frames = take(self);
    if (frames != NULL && (self->unsent || self->dropped) && reap(self) != 0)
        Py_CLEAR(frames);
    return frames;
}

static PyObject *wire_send(wire_t *self, PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs != 3) {
        PyErr_SetString(PyExc_TypeError, "send(data, tag, release)");
        return NULL;
    }
    unsigned long long tag = PyLong_AsUnsignedLongLong(args[1]);
    if (tag == (unsigned long long)-1 && PyErr_Occurred())
        return NULL;
    op_t *op = add_op(self, args[0], PyBUF_SIMPLE);
    if (op == NULL)
        return NULL;
    ucp_request_param_t param = {
        .op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_MEMORY_TYPE,
        .cb.send = on_sent,
        .user_data = &op->step,
        .memory_type = UCS_MEMORY_TYPE_HOST,
    };
    Py_ssize_t length = op->buffer.len;
    begun(&op->step, ucx.send(self->endpoint, op->buffer.buf, length, tag, &param), 0);
    ucs_status_t status = op->step.status;
    if (status != UCS_INPROGRESS) {
        free_op(op);
        if (status != UCS_OK)
            return raise_status(self, status);
        if (args[2] != Py_None) {
            PyObject *done = PyObject_CallNoArgs(args[2]);
            if (done == NULL)
                return NULL;
            Py_DECREF(done);
        }
        return PyLong_FromSsize_t(length);
    }
    op->is_send = 1;
    self->unsent++;
    if (args[2] != Py_None)
        op->release = Py_NewRef(args[2]);
    return PyLong_FromSsize_t(length);
}

static PyObject *wire_receive(wire_t *self, PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs != 2) {
        PyErr_SetString(PyExc_TypeError, "receive(into, tag)");
        return NULL;
    }
    unsigned long long tag = PyLong_AsUnsignedLongLong(args[1]);
    if (tag == (unsigned long long)-1 && PyErr_Occurred())
        return NULL;
    receive_t *receive = PyObject_New(receive_t, &receive_type);
    if (receive == NULL)
        return NULL;
    receive->wire = (wire_t *)Py_NewRef((PyObject *)self);
    receive->op = add_op(self, args[0], PyBUF_WRITABLE);
    if (receive->op == NULL) {
        Py_DECREF(receive);
        return NULL;
    }
    receive->op->owner = 1;
    begin_receive(self, &receive->op->step, receive->op->buffer.buf, receive->op->buffer.len, tag);
    return (PyObject *)receive;
}

static PyObject *wire_attach(wire_t *self, PyObject *endpoint)
{
    PyObject *handle = PyObject_GetAttrString(endpoint, "handle");

    self->endpoint = handle != NULL ? PyLong_AsVoidPtr(handle) : NULL;
    Py_XDECREF(handle);
    if (self->endpoint == NULL)
        return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_ValueError, "no endpoint");
    self->attached = 1;
    self->taken = self->count;
    post_taken(self);
    for (int i = 0; i < self->count; i++)
        if (self->pieces[i].step.status != UCS_INPROGRESS && self->pieces[i].step.status != UCS_OK)
            return raise_status(self, self->pieces[i].step.status);
    Py_RETURN_NONE;
}

static PyObject *wire_arm(wire_t *self, PyObject *unused)
{
    (void)unused;
    if (head_is_there(self))
        Py_RETURN_FALSE; /* UCX has delivered it, and would tell of what comes behind it alone */
    ucs_status_t status = ucx.arm(self->worker);
    if (status != UCS_OK && status != UCS_ERR_BUSY)
        return raise_status(self, status);
    return PyBool_FromLong(status == UCS_OK);
}

static PyObject *wire_stray(wire_t *self, PyObject *unused)
{
    (void)unused;
    ucp_tag_recv_info_t info;

    if (ucx.probe(self->worker, 0, 0, 0, &info) == NULL || info.sender_tag == self->control_tag)
        return PyLong_FromLong(-1);
    return PyLong_FromSize_t(info.length);
}

static PyObject *wire_cancel(wire_t *self, PyObject *unused)
{
    (void)unused;
    for (int i = 0; self->attached && i < self->count; i++)
        if (self->pieces[i].step.request != NULL)
            ucx.cancel(self->worker, self->pieces[i].step.request);
    for (op_t *op = self->all.next; op != &self->all; op = op->next)
        if (!op->is_send && op->step.request != NULL)
            ucx.cancel(self->worker, op->step.request);
    Py_RETURN_NONE;
}

static PyObject *wire_release(wire_t *self, PyObject *unused)
{
    (void)unused;
    PyObject *releases = PyList_New(0);

    if (releases == NULL)
        return NULL;
    self->unsent = self->dropped = 0;
    self->failed = 1;
    self->attached = 0;
    while (self->all.next != &self->all) {
        op_t *op = self->all.next;
        if (op->release != NULL && PyList_Append(releases, op->release) != 0)
            Py_CLEAR(releases);
        if (op->owner) { /* its Receive frees it */
            unlink_op(op);
            PyBuffer_Release(&op->buffer);
            op->step.request = NULL;
            op->step.status = UCS_ERR_CANCELED;
        } else {
            free_op(op);
        }
        if (releases == NULL)
            return NULL;
    }
    return releases;
}

static int wire_init(wire_t *self, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"worker",     "memory",      "count",       "control_tag", "body_max", "inline_max",
                            "payload_max", "frame_type", "decode",      "error",       NULL};
    PyObject *worker, *memory, *frame_type, *decode, *error;

    if (self->pieces != NULL) {
        PyErr_SetString(PyExc_TypeError, "made twice");
        return -1;
    }
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OOiKnnnO!OO", names, &worker, &memory, &self->count,
                                     &self->control_tag, &self->body_max, &self->inline_max, &self->payload_max,
                                     &PyType_Type, &frame_type, &decode, &error))
        return -1;
    self->all.next = self->all.previous = &self->all;
    self->worker = PyLong_AsVoidPtr(worker);
    if (self->worker == NULL)
        return -1;
    self->memory = PyMemoryView_FromObject(memory);
    if (self->memory == NULL || PyObject_GetBuffer(self->memory, &self->pinned, PyBUF_WRITABLE) != 0)
        return -1;
    self->empty = PyMemoryView_FromMemory("", 0, PyBUF_READ);
    self->pieces = PyMem_Calloc(self->count, sizeof *self->pieces);
    if (self->empty == NULL || self->pieces == NULL)
        return -1;
    self->piece_size = self->pinned.len / self->count;
    for (int i = 0; i < self->count; i++)
        self->pieces[i].data = (char *)self->pinned.buf + i * self->piece_size;
    self->taken = self->count; /* none is posted */
    self->frame_type = Py_NewRef(frame_type);
    self->decode = Py_NewRef(decode);
    self->error = Py_NewRef(error);
    return 0;
}

static void wire_dealloc(wire_t *self)
{
    if (self->pieces != NULL)
        while (self->all.next != &self->all)
            free_op(self->all.next);
    PyMem_Free(self->pieces);
    if (self->pinned.obj != NULL)
        PyBuffer_Release(&self->pinned);
    Py_XDECREF(self->memory);
    Py_XDECREF(self->empty);
    Py_XDECREF(self->frame_type);
    Py_XDECREF(self->decode);
    Py_XDECREF(self->error);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyObject *receive_completed(receive_t *self, void *unused)
{
    (void)unused;
    return PyBool_FromLong(self->op->step.status != UCS_INPROGRESS);
}

static PyObject *receive_check_error(receive_t *self, PyObject *unused)
{
    (void)unused;
    if (self->op->step.status != UCS_OK && self->op->step.status != UCS_INPROGRESS)
        return raise_status(self->wire, self->op->step.status);
    Py_RETURN_NONE;
}

static void receive_dealloc(receive_t *self)
{
    if (self->op != NULL) {
        self->op->owner = 0;
        if (self->op->step.status == UCS_INPROGRESS) {
            self->wire->dropped++;
            if (self->op->step.request != NULL)
                ucx.cancel(self->wire->worker, self->op->step.request);
        } else {
            free_op(self->op);
        }
    }
    Py_DECREF(self->wire);
    PyObject_Free(self);
}

static PyMethodDef wire_methods[] = {
    {"attach", (PyCFunction)wire_attach, METH_O, NULL},
    {"send", (PyCFunction)(void (*)(void))wire_send, METH_FASTCALL, NULL},
    {"receive", (PyCFunction)(void (*)(void))wire_receive, METH_FASTCALL, NULL},
    {"poll", (PyCFunction)wire_poll, METH_O, NULL},
    {"arm", (PyCFunction)wire_arm, METH_NOARGS, NULL},
    {"stray", (PyCFunction)wire_stray, METH_NOARGS, NULL},
    {"cancel", (PyCFunction)wire_cancel, METH_NOARGS, NULL},
    {"release", (PyCFunction)wire_release, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef wire_members[] = {
    {"unsent", T_INT, offsetof(wire_t, unsent), READONLY, NULL},
    {"failed", T_BOOL, offsetof(wire_t, failed), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyTypeObject wire_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "benchfs_fuse.rpc._wire.Wire",
    .tp_doc = "Carry the messages of one connection; see wire.py.",
    .tp_basicsize = sizeof(wire_t),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = PyType_GenericNew,
    .tp_init = (initproc)wire_init,
    .tp_dealloc = (destructor)wire_dealloc,
    .tp_methods = wire_methods,
    .tp_members = wire_members,
};

static PyMethodDef receive_methods[] = {
    {"check_error", (PyCFunction)receive_check_error, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef receive_getset[] = {
    {"completed", (getter)receive_completed, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyTypeObject receive_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "benchfs_fuse.rpc._wire.Receive",
    .tp_doc = "Stand for one receive of a payload; see wire.py.",
    .tp_basicsize = sizeof(receive_t),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .tp_dealloc = (destructor)receive_dealloc,
    .tp_methods = receive_methods,
    .tp_getset = receive_getset,
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "benchfs_fuse.rpc._wire",
    .m_doc = "Carry messages over UCX; see wire.py.",
    .m_size = -1,
};

PyMODINIT_FUNC PyInit__wire(void)
{
    void *library = dlopen("libucp.so.0", RTLD_NOW | RTLD_NOLOAD);

    if (library == NULL) {
        PyErr_SetString(PyExc_ImportError, "UCX has not been loaded");
        return NULL;
    }
    *(void **)&ucx.send = dlsym(library, "ucp_tag_send_nbx");
    *(void **)&ucx.receive = dlsym(library, "ucp_tag_recv_nbx");
    *(void **)&ucx.probe = dlsym(library, "ucp_tag_probe_nb");
    *(void **)&ucx.progress = dlsym(library, "ucp_worker_progress");
    *(void **)&ucx.arm = dlsym(library, "ucp_worker_arm");
    *(void **)&ucx.cancel = dlsym(library, "ucp_request_cancel");
    *(void **)&ucx.free = dlsym(library, "ucp_request_free");
    *(void **)&ucx.text = dlsym(library, "ucs_status_string");
    if (!ucx.send || !ucx.receive || !ucx.probe || !ucx.progress || !ucx.arm || !ucx.cancel || !ucx.free || !ucx.text) {
        PyErr_Format(PyExc_ImportError, "this UCX lacks a function: %s", dlerror());
        return NULL;
    }
    if (PyType_Ready(&wire_type) != 0 || PyType_Ready(&receive_type) != 0)
        return NULL;
    PyObject *made = PyModule_Create(&module);
    if (made != NULL && PyModule_AddObjectRef(made, "Wire", (PyObject *)&wire_type) != 0)
        Py_CLEAR(made);
    return made;
}
