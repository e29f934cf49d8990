/* Complete libfuse for a Python file system: what pyfuse3 leaves out, without touching pyfuse3.
 *
 * This library is loaded with RTLD_GLOBAL before pyfuse3. The dynamic linker then binds pyfuse3's calls of
 * fuse_session_new and fuse_session_process_buf to the functions below, which do their part and call
 * libfuse's own (found by RTLD_NEXT). libfuse's calls of itself are not affected: only what pyfuse3 calls passes here.
 *
 *   fuse_session_new          adds the operations that pyfuse3 has no handlers for, and wraps init, where capabilities
 *                             and limits of the connection are settled
 *   fuse_session_receive_buf  reads without waiting: pyfuse3's loop waits for the kernel elsewhere, and would stand still
 *   fuse_session_process_buf  notes, of the raw request that is about to be handled, what libfuse does not hand on
 *
 * An added operation calls a function of Python's (struct benchfs_hooks, filled in through ctypes), which answers with
 * libfuse's fuse_reply_* when it has the answer. Everything runs in the one thread of pyfuse3's loop, which holds the
 * GIL. The layout of the raw requests is the kernel's stable interface (linux/fuse.h).
 *
 * docs/companion.md says why this is sound, and which versions it was tried on.
 */
#define _GNU_SOURCE
#define FUSE_USE_VERSION 35

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fuse_lowlevel.h>
#include <linux/fuse.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>
#include <sys/file.h>
#include <unistd.h>

#define PUBLIC __attribute__((visibility("default")))

/* What the connection shall be; set before the session is made. 0 leaves a number as libfuse has it. */
struct benchfs_wishes {
	uint32_t want;
	uint32_t unwanted;
	uint32_t max_background;
	uint32_t congestion_threshold;
};

/* What came of it; set when the kernel has said hello. */
struct benchfs_granted {
	uint32_t capable;
	uint32_t want;
	uint32_t proto_minor;
};

/* The request that was handed to pyfuse3 last. flags: by opcode, see note(). received_ns: of CLOCK_MONOTONIC. */
struct benchfs_request {
	uint64_t unique;
	uint64_t lock_owner;
	uint64_t received_ns;
	uint32_t opcode;
	uint32_t flags;
	uint32_t pid;
};

/* Functions of Python's. A null hook leaves its operation out (ENOSYS: the kernel never asks again). */
struct benchfs_hooks {
	void (*fallocate)(fuse_req_t, uint64_t fh, int mode, int64_t offset, int64_t length);
	void (*lseek)(fuse_req_t, uint64_t fh, int64_t offset, int whence);
	void (*copy_file_range)(fuse_req_t, uint64_t fh, int64_t offset, uint64_t target_fh, int64_t target_offset,
				uint64_t length, int flags);
	void (*getlk)(fuse_req_t, uint64_t ino, uint64_t owner, int type, int64_t start, int64_t length);
	void (*setlk)(fuse_req_t, uint64_t ino, uint64_t fh, uint64_t owner, int flock, int type, int64_t start,
		      int64_t length, int pid, int wait, uint64_t unique);
	void (*setxattr)(fuse_req_t, uint64_t ino, const char *name, const char *value, uint64_t size, int flags,
			 uint32_t uid);
	void (*interrupt)(uint64_t unique);
};

/* Who sent the latest requests: the kernel numbers them in steps of 2. */
#define ASKED_MAX 8192
static struct {
	uint64_t unique;
	uint32_t pid;
} asked[ASKED_MAX];

/* SHA-256 of this file, as setup.py has seen it. */
PUBLIC const char benchfs_source[] = BENCHFS_SOURCE;

PUBLIC struct benchfs_wishes benchfs_wishes;
PUBLIC struct benchfs_granted benchfs_granted;
PUBLIC struct benchfs_request benchfs_request;
PUBLIC struct benchfs_hooks benchfs_hooks;
static struct fuse_lowlevel_ops completed;
static void (*wrapped_init)(void *, struct fuse_conn_info *);
static struct fuse_session *session;

static void complete_init(void *userdata, struct fuse_conn_info *conn)
{
	if (wrapped_init)
		wrapped_init(userdata, conn);
	conn->want |= benchfs_wishes.want & conn->capable;
	conn->want &= ~benchfs_wishes.unwanted;
	if (benchfs_wishes.max_background)
		conn->max_background = benchfs_wishes.max_background;
	if (benchfs_wishes.congestion_threshold)
		conn->congestion_threshold = benchfs_wishes.congestion_threshold;
	benchfs_granted.capable = conn->capable;
	benchfs_granted.want = conn->want;
	benchfs_granted.proto_minor = conn->proto_minor;
}

static void on_fallocate(fuse_req_t req, fuse_ino_t ino, int mode, off_t offset, off_t length,
			 struct fuse_file_info *fi)
{
	(void)ino;
	benchfs_hooks.fallocate(req, fi->fh, mode, offset, length);
}

static void on_lseek(fuse_req_t req, fuse_ino_t ino, off_t offset, int whence, struct fuse_file_info *fi)
{
	(void)ino;
	benchfs_hooks.lseek(req, fi->fh, offset, whence);
}

static void on_copy_file_range(fuse_req_t req, fuse_ino_t ino, off_t offset, struct fuse_file_info *fi,
			       fuse_ino_t target_ino, off_t target_offset, struct fuse_file_info *target_fi,
			       size_t length, int flags)
{
	(void)ino;
	(void)target_ino;
	benchfs_hooks.copy_file_range(req, fi->fh, offset, target_fi->fh, target_offset, length, flags);
}

static void on_getlk(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi, struct flock *lock)
{
	benchfs_hooks.getlk(req, ino, fi->lock_owner, lock->l_type, lock->l_start, lock->l_len);
}

static void on_setlk(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi, struct flock *lock, int wait)
{
	benchfs_hooks.setlk(req, ino, fi->fh, fi->lock_owner, 0, lock->l_type, lock->l_start, lock->l_len,
			    lock->l_pid, wait, benchfs_request.unique);
}

static void on_flock(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi, int op)
{
	int type = op & LOCK_EX ? F_WRLCK : op & LOCK_SH ? F_RDLCK : F_UNLCK;

	benchfs_hooks.setlk(req, ino, fi->fh, fi->lock_owner, 1, type, 0, 0, fuse_req_ctx(req)->pid,
			    !(op & LOCK_NB), benchfs_request.unique);
}

static void on_setxattr(fuse_req_t req, fuse_ino_t ino, const char *name, const char *value, size_t size, int flags)
{
	benchfs_hooks.setxattr(req, ino, name, value, size, flags, fuse_req_ctx(req)->uid);
}

static void *libfuse(const char *name)
{
	return dlsym(RTLD_NEXT, name);
}

/* Make the table of operations that libfuse gets in place of pyfuse3's. */
static void complete(const struct fuse_lowlevel_ops *op, size_t op_size)
{
	memset(&completed, 0, sizeof completed);
	memcpy(&completed, op, op_size < sizeof completed ? op_size : sizeof completed);
	wrapped_init = completed.init;
	completed.init = complete_init;
	if (benchfs_hooks.fallocate)
		completed.fallocate = on_fallocate;
	if (benchfs_hooks.lseek)
		completed.lseek = on_lseek;
	if (benchfs_hooks.copy_file_range)
		completed.copy_file_range = on_copy_file_range;
	if (benchfs_hooks.getlk)
		completed.getlk = on_getlk;
	if (benchfs_hooks.setlk) {
		completed.setlk = on_setlk;
		completed.flock = on_flock;
	}
	if (benchfs_hooks.setxattr)
		completed.setxattr = on_setxattr;
}

#undef fuse_session_new /* libfuse 3.17 makes it a macro that calls the one below */
PUBLIC struct fuse_session *fuse_session_new(struct fuse_args *args, const struct fuse_lowlevel_ops *op,
					     size_t op_size, void *userdata)
{
	struct fuse_session *(*next)(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t, void *) =
		libfuse("fuse_session_new");

	complete(op, op_size);
	session = next(args, &completed, sizeof completed, userdata);
	return session;
}

/* What programs call that were built with libfuse 3.17 or newer; the version is theirs. */
struct libfuse_version;
PUBLIC struct fuse_session *fuse_session_new_versioned(struct fuse_args *args, const struct fuse_lowlevel_ops *op,
						       size_t op_size, struct libfuse_version *version,
						       void *userdata)
{
	struct fuse_session *(*next)(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t,
				     struct libfuse_version *, void *) = libfuse("fuse_session_new_versioned");

	complete(op, op_size);
	session = next(args, &completed, sizeof completed, version, userdata);
	return session;
}

/* Note what a handler may want to know of its request: pyfuse3 starts the handler before the next one is read. */
static void note(const struct fuse_in_header *in, size_t size)
{
	const void *body = in + 1;
	size_t left = size - sizeof *in;
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	benchfs_request.received_ns = (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
	if (in->opcode != FUSE_INTERRUPT) { /* which is numbered like the request that it interrupts, but for a bit */
		asked[in->unique / 2 % ASKED_MAX].unique = in->unique;
		asked[in->unique / 2 % ASKED_MAX].pid = in->pid;
	}
	benchfs_request.pid = in->pid;
	benchfs_request.unique = in->unique;
	benchfs_request.opcode = in->opcode;
	benchfs_request.flags = 0;
	benchfs_request.lock_owner = 0;
	if (in->opcode == FUSE_SETATTR && left >= sizeof(struct fuse_setattr_in)) {
		benchfs_request.flags = ((const struct fuse_setattr_in *)body)->valid;
	} else if (in->opcode == FUSE_WRITE && left >= sizeof(struct fuse_write_in)) {
		benchfs_request.flags = ((const struct fuse_write_in *)body)->write_flags;
	} else if (in->opcode == FUSE_FLUSH && left >= sizeof(struct fuse_flush_in)) {
		benchfs_request.lock_owner = ((const struct fuse_flush_in *)body)->lock_owner;
	} else if (in->opcode == FUSE_RELEASE && left >= sizeof(struct fuse_release_in)) {
		benchfs_request.flags = ((const struct fuse_release_in *)body)->release_flags;
		benchfs_request.lock_owner = ((const struct fuse_release_in *)body)->lock_owner;
	} else if (in->opcode == FUSE_INTERRUPT && left >= sizeof(struct fuse_interrupt_in)) {
		if (benchfs_hooks.interrupt)
			benchfs_hooks.interrupt(((const struct fuse_interrupt_in *)body)->unique);
	}
}

/* Read a request, if there still is one: the kernel takes back those of callers that are killed. A read that waited for
 * the next one would hold up all of pyfuse3's loop. -EINTR has the loop wait for the kernel again. */
PUBLIC int fuse_session_receive_buf(struct fuse_session *se, struct fuse_buf *buf)
{
	static int (*next)(struct fuse_session *, struct fuse_buf *);
	static struct fuse_session *prepared;
	int received;

	if (!next)
		next = libfuse("fuse_session_receive_buf");
	if (prepared != se) {
		int fd = fuse_session_fd(se);

		fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
		prepared = se;
	}
	received = next(se, buf);
	return received == -EAGAIN ? -EINTR : received;
}

PUBLIC void fuse_session_process_buf(struct fuse_session *se, const struct fuse_buf *buf)
{
	static void (*next)(struct fuse_session *, const struct fuse_buf *);

	if (!next)
		next = libfuse("fuse_session_process_buf");
	if (!(buf->flags & FUSE_BUF_IS_FD) && buf->size >= sizeof(struct fuse_in_header))
		note(buf->mem, buf->size);
	next(se, buf);
}

/* Return the thread that sent a request, 0 if that was forgotten. */
PUBLIC uint32_t benchfs_asked(uint64_t unique)
{
	return asked[unique / 2 % ASKED_MAX].unique == unique ? asked[unique / 2 % ASKED_MAX].pid : 0;
}

/* Free the caller of a request whose handler goes on: EINTR. The handler's own answer then finds no request and is
 * dropped (the kernel says ENOENT, which libfuse takes for an interrupted request). Returns 0 or an errno. */
PUBLIC int benchfs_free_caller(uint64_t unique)
{
	struct fuse_out_header out = { .len = sizeof out, .error = -EINTR, .unique = unique };

	return write(fuse_session_fd(session), &out, sizeof out) == sizeof out ? 0 : errno;
}

/* Have the kernel write back and forget its pages of a part of a file (length 0: to the end). Blocks until requests that
 * this takes are answered. Returns 0 or an errno. */
PUBLIC int benchfs_write_back(uint64_t ino, int64_t offset, int64_t length)
{
	return -fuse_lowlevel_notify_inval_inode(session, ino, offset, length);
}
